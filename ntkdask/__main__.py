"""`python -m ntkdask`: the command line."""

from ntkdask.cli.commands import main

if __name__ == "__main__":
    main()
