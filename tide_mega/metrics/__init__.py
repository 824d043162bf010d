"""What is measured of a run: sums over tokens by decile and layer, records, and the file they go to."""
