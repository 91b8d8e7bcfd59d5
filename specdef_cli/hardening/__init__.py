"""Plan what changes, stream it, verify it, publish it; and the way back."""
