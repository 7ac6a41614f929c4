"""What a run has left: its report, an HTML page, and its rollouts."""
