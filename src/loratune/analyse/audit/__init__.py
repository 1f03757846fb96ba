"""Is a comparison of methods fair? Readers make `AuditRow`s, detectors make `Finding`s.

`rows` the record and the fields that a column can be mapped to; `from_results`, `from_csv` and
`from_peft` the readers; `detectors` one function for each kind of finding; `effects` the smallest
differences that can be told; `inspect` puts them together. A detector knows nothing of files.
"""
