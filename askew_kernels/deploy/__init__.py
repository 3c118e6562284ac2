"""What happens to a trained model: files of packed weights, their inspection, conversions and exports."""
