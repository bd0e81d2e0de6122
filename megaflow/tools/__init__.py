"""One module per sub-command of the `megaflow` program."""
