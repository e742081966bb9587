// Patch Conv in the front end: after a run, what it took stands on the node; a click opens a chart of it.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { followCharts } from "./dialog.js";
import { followMode } from "./ignored.js";
import { hide, show } from "./node_report.js";

const EVENT = "patchconv.report";
const SETTING = "PatchConv.Report.ShowOnNodes";
const REPORTING = ["PatchConv_VAE", "PatchConv_Model", "PatchConv_UpscaleImage"];
const TEXT_NODE = "PatchConv_Report";

const contents = new Map(); // of a node, by `keyOf`: { reports } or { text }
const graphs = new Map(); // id of the workflow, by that of the prompt
let shows = true; // the setting

const root = () => app.rootGraph ?? app.graph;
const keyOf = (graph, node) => `${graph} ${node}`;

/** The node of the open workflow with an id as the server has it: `12:3` is node 3 in subgraph node 12. */
function nodeOf(id) {
    const path = String(id).split(":");
    let graph = root();
    for (const step of path.slice(0, -1)) graph = graph?.getNodeById(step)?.subgraph;
    return graph?.getNodeById(path.at(-1)) ?? null;
}

function display(graph, id) {
    const node = graph === root()?.id ? nodeOf(id) : null;
    const key = keyOf(graph, id);
    const content = contents.get(key);
    if (!node || !content) return;
    const type = node.comfyClass ?? node.type;
    if (!(content.reports ? REPORTING.includes(type) : type === TEXT_NODE)) return;
    node.patchConvReports = () => contents.get(key)?.reports ?? [];
    if (shows) show(node, key, content);
    else hide(node);
    if (content.reports) followCharts(key, content.reports);
}

function displayAll() {
    if (!contents.size) return; // the host calls this before there is a graph, too
    const graph = root()?.id;
    for (const key of contents.keys()) {
        const [of, id] = key.split(" ");
        if (of === graph) display(graph, id);
    }
}

/**
 * Keep which workflow a prompt comes from: another may be open by the time that it runs.
 *
 * The front end has no hook for this: its events tell of a prompt that was queued without its id or its workflow. So we
 * wrap `queuePrompt`, which an extension cannot take off again, and pass on all that goes in and out as it is.
 */
function followQueue() {
    const queue = api.queuePrompt;
    api.queuePrompt = async function (...args) {
        const answer = await queue.apply(this, args);
        if (answer?.prompt_id) graphs.set(answer.prompt_id, args[1]?.workflow?.id ?? root()?.id);
        return answer;
    };
}

function onReport({ detail: report }) {
    const graph = graphs.get(report.prompt) ?? root()?.id;
    const key = keyOf(graph, report.node);
    const others = (contents.get(key)?.reports ?? []).filter(
        (one) => one.prompt === report.prompt && one.part !== report.part,
    );
    contents.set(key, { reports: [...others, report] });
    display(graph, report.node);
}

/** Of a node that a loop has made once more, `display_node` is the one that is seen. */
function onExecuted({ detail: { node, display_node: id = node, prompt_id: prompt, output } }) {
    const text = output?.text;
    const graph = graphs.get(prompt) ?? root()?.id;
    if (!text || graph !== root()?.id || (nodeOf(id)?.comfyClass ?? "") !== TEXT_NODE) return;
    contents.set(keyOf(graph, id), { text: [text].flat().join("\n") });
    display(graph, id);
}

app.registerExtension({
    name: "PatchConv",
    settings: [
        {
            id: SETTING,
            category: ["Patch Conv", "Report", "ShowOnNodes"],
            name: "Show on the nodes what a run took",
            tooltip: "Strips, peak memory and time, measured, under Patch Conv (VAE), Patch Conv (Model) and Upscale Image (Patch Conv).",
            type: "boolean",
            defaultValue: true,
            onChange(value) {
                shows = value; // which the host keeps only after this
                displayAll();
            },
        },
        {
            id: "PatchConv.InsteadOfTiles", // read by nodes/instead_of_tiles.py
            category: ["Patch Conv", "Memory", "InsteadOfTiles"],
            name: "Stream instead of tiling when a VAE runs out of memory",
            tooltip: "A decode or encode that would go on in tiles begins anew, streamed: the same pixels, no seams.",
            type: "boolean",
            defaultValue: false,
        },
    ],
    setup() {
        shows = app.extensionManager.setting.get(SETTING) ?? true;
        const style = Object.assign(document.createElement("link"), { rel: "stylesheet" });
        style.href = new URL("./patchconv.css", import.meta.url).href;
        document.head.append(style);
        followQueue();
        api.addEventListener("execution_start", ({ detail: { prompt_id: prompt } }) => {
            if (!graphs.has(prompt)) graphs.set(prompt, root()?.id);
        });
        api.addEventListener(EVENT, onReport);
        api.addEventListener("executed", onExecuted);
    },
    nodeCreated: followMode,
    afterConfigureGraph: displayAll,
});
