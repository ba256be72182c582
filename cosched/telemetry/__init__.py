"""What a run leaves behind: events, figures, and the folder that holds them."""
