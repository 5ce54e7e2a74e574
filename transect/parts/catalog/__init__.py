"""The parts themselves."""
