"""`python -m kvfleet`."""

from kvfleet.main import main

if __name__ == "__main__":
    main()
