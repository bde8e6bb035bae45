"""What the routers learned, in numbers, figures and one page."""
