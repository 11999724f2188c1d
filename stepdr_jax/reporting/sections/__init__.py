"""The sections of the run report as plain values for its template: sentences, tables and figures from collected data."""
