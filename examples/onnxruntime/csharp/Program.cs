// Runs a model with packed weights through Microsoft.ML.OnnxRuntime 1.17 or later:
//
//     dotnet run -- MODEL LIBRARY K [ROWS]
//
// MODEL has one input X, float32 [rows, K], and one output Y. LIBRARY is what
// `python -c "import zeroskip; print(zeroskip.custom_ops_path())"` prints.
using System;
using System.Linq;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

internal static class Program
{
    private static int Main(string[] args)
    {
        if (args.Length < 3)
        {
            Console.Error.WriteLine("usage: run_sparse MODEL LIBRARY K [ROWS]");
            return 2;
        }
        int columns = int.Parse(args[2]);
        int rows = args.Length > 3 ? int.Parse(args[3]) : 1;

        using var options = new SessionOptions { IntraOpNumThreads = 2 };
        // The one line that makes packed weights fast.
        options.RegisterCustomOpLibrary(args[1]);
        using var session = new InferenceSession(args[0], options);

        float[] x = Enumerable.Range(0, rows * columns).Select(i => (float)(i % 7) - 3).ToArray();
        var input = new DenseTensor<float>(x, new[] { rows, columns });
        using var outputs = session.Run(new[] { NamedOnnxValue.CreateFromTensor("X", input) });
        foreach (float y in outputs.Single().AsTensor<float>())
        {
            Console.WriteLine(y);
        }
        return 0;
    }
}
