"""The study's eight findings, each judged by an explicit rule from records: no verdict is written by hand."""
