"""The basis of all other packages: errors, files, interrupts, memory, progress, ranks, fusion."""
