"""One file per format: what a path holds, reading it without executing anything, writing it whole or not at all."""
