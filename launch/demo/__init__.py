"""The demo and the pictures it draws."""
