"""Speed of this project beside that of a peer, each with one command."""
