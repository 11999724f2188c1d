"""What a person looks at: the run report, its plots and trajectory viewer, and the page of a cited answer."""
