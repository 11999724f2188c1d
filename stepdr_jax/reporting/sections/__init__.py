"""The sections of the run report: sentences, tables and figures from collected data, as values for its template."""
