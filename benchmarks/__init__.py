"""What second order costs, measured."""
