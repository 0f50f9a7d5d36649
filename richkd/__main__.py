"""`python -m richkd` is the command line."""

from richkd.cli import main

if __name__ == "__main__":
    main()
