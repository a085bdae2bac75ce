"""`python -m llmbuild`: the command line without its script."""

from llmbuild.cli import main

if __name__ == "__main__":
    main()
