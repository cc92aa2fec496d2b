"""From corpora to mixture weights, by metrics that can be checked (MobileLLM-R1, arXiv 2509.24945, section 5)."""
