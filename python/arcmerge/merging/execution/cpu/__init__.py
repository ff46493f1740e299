"""The Processor of the CPU."""
