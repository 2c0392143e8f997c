"""VN-Net (arXiv 2404.16037): forecasts at weather stations from numbers and satellite pictures, fused by a mixture of experts."""
