"""Model cards and the other files of a Hub repository."""
