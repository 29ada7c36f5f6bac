"""The paper's experiment: does LMF beat cross-entropy, focal loss and LDAM on imbalanced images?"""
