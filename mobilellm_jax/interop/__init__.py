"""The ways out to other programs, written without installing their packages."""
