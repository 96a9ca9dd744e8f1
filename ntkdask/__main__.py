"""`python -m ntkdask`: the command line."""

from ntkdask.cli import main

if __name__ == "__main__":
    main()
