"""What a lab adds to mixmask in a package of its own."""
