"""Small self-contained training scripts that show a diverging inner loop and its healthy twin."""
