"""Search: text rules, citation ids, the embedded index with its ranking, OpenSearch and web search providers."""
