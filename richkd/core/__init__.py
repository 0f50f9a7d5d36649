"""What every other package uses: errors, files, interrupts, memory, progress, ranks, the blend."""
