"""What is measured of a run: sums over tokens by decile and layer, records of them, and the file they go to."""
