"""Run a plan: exchange rows and attend to them, forward and backward."""
