"""``python -m seqmodels`` is the command ``seqmodels``."""

from seqmodels.cli import main

if __name__ == "__main__":
    main()
