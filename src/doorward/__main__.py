"""`python -m doorward`: the command line, where no script of that name is on the path."""

from doorward.cli.app import main

if __name__ == "__main__":
    main()
