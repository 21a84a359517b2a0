"""What a search is made of: space, trials, objective, records, pictures."""
