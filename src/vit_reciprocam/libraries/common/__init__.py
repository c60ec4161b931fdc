"""What the folders of several libraries share."""
