"""The report: records of one bundle, or of several, as one page that people read."""
