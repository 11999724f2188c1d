"""Search over the world's passages: text rules, citation ids, the index and its ranking."""
