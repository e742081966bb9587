"""What ComfyUI's nodes and the WebUI's script share: a VAE's halves, estimates, figures and charts. Imports no host."""
