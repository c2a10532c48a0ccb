"""How good is a ranking? mAP and CMC, re-ranking, the benchmark's rules, figures."""
