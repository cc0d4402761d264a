"""Keras models (.keras, .h5): read as data, and built of torch layers."""
