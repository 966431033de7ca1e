"""How a compiled kernel is called: its argument records, and the threads that run its tasks."""
