"""From corpora to mixture weights, by metrics that can be checked (MobileLLM-R1, section 5)."""
