"""What people look at: figures and the demo."""
