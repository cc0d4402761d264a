"""One module per kind of input. Other rooms never ask which kind it is."""
