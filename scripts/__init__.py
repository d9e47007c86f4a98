"""Programs that a person runs: `python -m scripts.<name> --help`. They may use every room, and none uses them."""
