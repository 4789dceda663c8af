"""Where weights live and when they move: the ring, the flash reader, residency and streaming."""
