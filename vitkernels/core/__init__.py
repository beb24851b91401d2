"""What every operator shares: its declaration, backend choice, checks, autocast and the compiled module."""
