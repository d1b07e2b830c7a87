"""Which configuration a kernel runs with: chosen by a closed form, or by measurement where the user asked for it."""
