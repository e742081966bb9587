// Has inputs of Patch Conv (VAE) look inactive, and be so, while its mode ignores them.

const NODE = "PatchConv_VAE";
const IGNORED = { patch: ["budget"], stream: ["splits", "threshold"] };
const NUMBERS = ["splits", "threshold", "budget"];

const dimmed = new Map(); // nodes of the graph, whose inactive inputs are dimmed, and their ids
const style = document.createElement("style");

/** Follow the mode of a new node, if it is one of ours. */
export function followMode(node) {
    const mode = modeOf(node);
    if (!mode) return;
    after(mode, "callback", () => mark(node, mode));
    for (const change of ["onAdded", "onConfigure", "onConnectionsChange"]) after(node, change, () => mark(node, mode));
    after(node, "onRemoved", () => dim(node, null));
    mark(node, mode);
}

/** Mark what the mode of a node ignores. A mode that comes over a link is not known: all count then. */
function mark(node, mode) {
    const linked = node.inputs?.some((input) => input.widget?.name === mode.name && input.link != null);
    const ignored = (linked ? [] : IGNORED[mode.value]) ?? [];
    for (const widget of node.widgets) if (NUMBERS.includes(widget.name)) widget.disabled = ignored.includes(widget.name);
    dim(node, node.id);
    node.setDirtyCanvas?.(true, true);
}

/**
 * Have inactive inputs of a node look so in Nodes 2.0, which switches them off and shows what they hold as before.
 * id: the node's; null, or -1, while it is in no graph.
 */
function dim(node, id) {
    if ((dimmed.get(node) ?? -1) === (id ?? -1)) return;
    if (id == null || id === -1) dimmed.delete(node);
    else dimmed.set(node, id);
    const nodes = [...new Set(dimmed.values())].map((one) => `.lg-node[data-node-id="${CSS.escape(one)}"]`);
    style.textContent = nodes.length ? `:is(${nodes.join(", ")}) input:disabled { opacity: 0.4; }` : "";
    if (!style.isConnected) document.head.append(style);
}

/** Do something after each call of a method, which others may have put there. */
function after(object, name, act) {
    const method = object[name];
    object[name] = function (...args) {
        const answer = method?.apply(this, args);
        act();
        return answer;
    };
}

function modeOf(node) {
    if ((node.comfyClass ?? node.type) !== NODE) return undefined;
    return node.widgets?.find((widget) => widget.name === "mode");
}
