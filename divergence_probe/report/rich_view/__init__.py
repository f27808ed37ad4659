"""The parts of the terminal report, as rich text laid out for a given width."""
